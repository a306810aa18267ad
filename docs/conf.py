project = "machmoe"
copyright = "the machmoe developers"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "machmoe"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
