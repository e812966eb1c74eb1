"""What every package stands on: errors, files, locks, processes, ranks, plug-ins, places outside this machine."""
