"""How the processes of a job are started, find each other, and end together."""
