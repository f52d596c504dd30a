"""Prints the literals of tests/method/skips.rs: skips brought to another height and width, and their vector-Jacobian products, as the
definitions state them, in exact fractions. Averaging: output row r averages rows floor(r H / h) .. ceil((r + 1) H / h) - 1
(PyTorch's adaptive_avg_pool2d); spreading: row r takes row floor(r H / h); columns alike. Each is a matrix A along the rows and one
along the columns, B: y = A x B', and from y's cotangent g comes x's, A' g B. The joined inputs are main + P(spread(x)), P behind the
spreading. Usage: python3 tests/reference/skips.py"""

from fractions import Fraction as F


def tensor(n, start):
    """n quarters between -5/4 and 5/4."""
    return [F((7 * (i + start) + 3) % 11 - 5, 4) for i in range(n)]


def averaging(big, small):
    rows = []
    for r in range(small):
        first, end = r * big // small, -(-(r + 1) * big // small)
        rows.append([F(1, end - first) if first <= i < end else F(0) for i in range(big)])
    return rows


def spreading(small, big):
    return [[F(int(r * small // big == i)) for i in range(small)] for r in range(big)]


def transposed(m):
    return [list(row) for row in zip(*m)]


def product(a, b):
    return [[sum(x * y for x, y in zip(row, column)) for column in zip(*b)] for row in a]


def along(a, x, b, channels):
    """A x B' of x [H, W, C], flat."""
    h, w = len(a[0]), len(b[0])
    planes = []
    for c in range(channels):
        plane = [[x[(i * w + j) * channels + c] for j in range(w)] for i in range(h)]
        planes.append(product(product(a, plane), transposed(b)))
    return [planes[c][i][j] for i in range(len(a)) for j in range(len(b)) for c in range(channels)]


def show(name, values):
    print(f"{name} [{', '.join(f'{float(v):.15g}' for v in values)}]")


for name, kind, (h, w), (oh, ow) in [
    ("average", averaging, (7, 5), (4, 3)),
    ("average 2", averaging, (4, 5), (2, 3)),
    ("spread", spreading, (3, 2), (5, 5)),
    ("spread 2", spreading, (2, 3), (4, 3)),
]:
    a, b = kind(h, oh), kind(w, ow)
    show(f"{name} {h}x{w} to {oh}x{ow}", along(a, tensor(h * w, 1), b, 1))
    show(f"{name} vjp", along(transposed(a), tensor(oh * ow, 4), transposed(b), 1))

# One sample: main 3x4 of 2 channels, a skip of 2x3 of 3 channels, its adapter's weight [2, 3] and bias [2].
main, skip, weight, bias, g = tensor(24, 1), tensor(18, 2), tensor(6, 3), tensor(2, 5), tensor(24, 6)
a, b = spreading(2, 3), spreading(3, 4)
wide = along(a, skip, b, 3)
show("sum", [main[2 * p + o] + sum(weight[3 * o + c] * wide[3 * p + c] for c in range(3)) + bias[o] for p in range(12) for o in range(2)])
wide_g = [sum(weight[3 * o + c] * g[2 * p + o] for o in range(2)) for p in range(12) for c in range(3)]
show("sum, skip's cotangent", along(transposed(a), wide_g, transposed(b), 3))
show("sum, weight", [sum(g[2 * p + o] * wide[3 * p + c] for p in range(12)) for o in range(2) for c in range(3)])
show("sum, bias", [sum(g[2 * p + o] for p in range(12)) for o in range(2)])
g = tensor(60, 6)
show("concat, skip's cotangent", along(transposed(a), [g[5 * p + 2 + c] for p in range(12) for c in range(3)], transposed(b), 3))
