pytest_plugins = "vdcache.testing.plugin"
