"""Pages: what a report consists of, and how it becomes a file; nothing here knows trials, studies or comparisons.

`pieces.py` has the pieces of a page, `html.py` makes one HTML file of them, `png.py` a picture of each chart.
"""
