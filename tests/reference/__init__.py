"""Float64 definitions of every op, written from the papers and not from the C++: the first truth.

Each function takes what the op takes (any float dtype, read as it is stored), computes in float64
and returns new tensors. They are slow on purpose: one idea per line, no tiles, no online softmax.
"""
