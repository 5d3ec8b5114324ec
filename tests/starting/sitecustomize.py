"""Imported by Python at the start of each process that tests start: it can be asked where it is."""

import faulthandler
import signal

faulthandler.register(
    signal.SIGUSR2
)  # in C, so that a process that hangs there answers too; forks inherit it
