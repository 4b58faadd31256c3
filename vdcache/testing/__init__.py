"""For tests of passes, policies and predictors, of vdcache and of other packages. Nothing else in vdcache imports it.

    from vdcache.testing import assert_pass, assert_refuses, assert_skipped

`pytest_plugins = "vdcache.testing.plugin"` gives the same as fixtures. `residual_nets` needs hypothesis, `small_models` is larger
where diffusers is installed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
