"""Tests that boot real machines in QEMU, and the machine that they boot."""
