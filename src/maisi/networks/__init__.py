"""The networks: mathematics and configuration only; no files, devices, schedulers or splitting."""
