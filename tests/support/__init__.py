"""What tests share: small runs, faults to break them with, launchers, a device in Python, a cluster on one machine."""
