"""Coldspare's core: backups that are virtual disks, merged in place and booted as they are."""
