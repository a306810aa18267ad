project = "machmoe"
copyright = "the machmoe developers"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "machmoe"
exclude_patterns = ["_build"]
