"""Prints the literals of tests/method/optim.rs: the update rules as PyTorch's documentation states them (torch.optim.SGD, AdamW,
RMSprop; defaults of dampening, amsgrad, centered), in float64. Needs numpy. Usage: python tests/reference/optim.py"""

import numpy as np

P0 = np.array([1.0, -2.0, 0.5])
GRADS = [np.array([0.5, -1.0, 0.0]), np.array([-0.25, 0.75, 1.5]), np.array([2.0, 0.125, -0.5])]


def sgd(lr, momentum=0.0, weight_decay=0.0, nesterov=False):
    p, b = P0.copy(), None
    for g in GRADS:
        g = g + weight_decay * p
        if momentum != 0:
            b = g if b is None else momentum * b + g
            g = g + momentum * b if nesterov else b
        p = p - lr * g
    return p


def adamw(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    p, m, v = P0.copy(), 0.0, 0.0
    for t, g in enumerate(GRADS, 1):
        p = p - lr * weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        p = p - lr * m_hat / (np.sqrt(v_hat) + eps)
    return p


def rmsprop(lr=1e-2, alpha=0.99, eps=1e-8, momentum=0.0, weight_decay=0.0):
    p, v, b = P0.copy(), 0.0, 0.0
    for g in GRADS:
        g = g + weight_decay * p
        v = alpha * v + (1 - alpha) * g**2
        step = g / (np.sqrt(v) + eps)
        if momentum > 0:
            b = momentum * b + step
            step = b
        p = p - lr * step
    return p


def clipped_sgd(lr, most):
    p = P0.copy()
    for g in GRADS:
        p = p - lr * g * min(1.0, most / (np.linalg.norm(g) + 1e-6))
    return p


for name, value in [
    ("sgd", sgd(0.1)),
    ("sgd decay", sgd(0.1, weight_decay=0.05)),
    ("sgd momentum", sgd(0.1, 0.9, 0.05)),
    ("sgd nesterov", sgd(0.1, 0.9, 0.05, True)),
    ("adamw", adamw()),
    ("adamw set", adamw(0.1, (0.8, 0.95), 1e-3, 0.2)),
    ("rmsprop", rmsprop()),
    ("rmsprop set", rmsprop(0.05, 0.9, 1e-3, 0.7, 0.1)),
    ("clipped", clipped_sgd(0.1, 1.0)),
]:
    print(f"{name:13} [{', '.join(f'{v:.15g}' for v in value)}]")
