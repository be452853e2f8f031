"""peer_gate.py: how compare_gpu.py and the processes of peer_gpu.py take turns on one card: by files in a folder."""
import os
import time


def name(case, mode):
    return f"{case['name']}-{mode}".replace(" ", "_")


def touch(gate, what):
    with open(os.path.join(gate, what), "w", encoding="ascii"):
        pass


def wait(gate, which):
    """Says that `which` is ready, and comes back when it has its turn."""
    touch(gate, f"ready-{which}")
    while not os.path.exists(os.path.join(gate, f"go-{which}")):
        time.sleep(0.05)


def is_ready(gate, which):
    return os.path.exists(os.path.join(gate, f"ready-{which}"))


def let_go(gate, which):
    touch(gate, f"go-{which}")
