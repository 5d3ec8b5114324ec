"""Training on one CUDA device, compared with loops by hand and other trainers: `python -m benchmarks gpu`.

Each part runs in a process of its own, within a budget of time, and all of them within ten minutes. On a machine
without CUDA, `--quick` rehearses the same code with tiny shapes on the CPU, where its figures mean nothing.
"""
