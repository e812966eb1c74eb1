"""Functions that every package uses: errors, files, locks, processes, ranks, plug-ins, object stores."""
