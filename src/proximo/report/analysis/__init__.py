"""Analysis of a trained policy and its value function on fresh episodes.

`episodes` plays them; each other module computes one view, which is a picture, a table and a verdict in one sentence.
"""
