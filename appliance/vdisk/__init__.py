"""Virtual-disk files: pure format code on the standard library. No devices, no policy."""
