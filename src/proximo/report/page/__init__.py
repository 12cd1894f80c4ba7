"""The report of one or several runs: one HTML file that needs no network.

`content` reads what the page shows, `write` fills the template, which holds style and script.
"""
