"""The ground floor: settings, errors, the command line, signals, progress, parallel work, keyed random numbers."""
