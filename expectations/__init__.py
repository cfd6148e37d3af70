"""What we expect of training rows and of golden sets, as Great Expectations suites in code."""

import os

# Great Expectations reads this once, when it is first imported; nothing here may call home.
os.environ["GX_ANALYTICS_ENABLED"] = "false"
