"""`qwen1m bench`: the user's own model on the user's own machine, in the words of vLLM's bench.

Figures of one run on one machine; comparisons with other software are bench/'s work.
"""
