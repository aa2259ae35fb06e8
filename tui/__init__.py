"""The console. It starts jobs and reads files; the core never imports it."""
