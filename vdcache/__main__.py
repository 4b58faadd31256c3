"""`python -m vdcache` is the command `vdcache`."""

from vdcache.cli.main import app

app(prog_name="vdcache")
