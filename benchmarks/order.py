"""What the order of samples costs with many clips: building it, an epoch's shuffle, and a resume.

`python -m benchmarks.order [--items 100000]` prints processor time and memory. The clips are of two sources, one of them taken one
and a half times an epoch, in nine buckets, eight a step. A resume plans a step of the hundredth epoch first.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable

from finetune.data.sampler import Order
from finetune.recipe import Bucket

BATCH = 8


def build(count: int) -> Order:
    """The order of so many items."""
    buckets = [Bucket(17, 32 * (4 + number % 9), 96) for number in range(count)]
    return Order(buckets, BATCH, 42, [number % 2 for number in range(count)], [1.0, 1.5])


def timed(name: str, call: Callable[[], object]) -> None:
    """Print the processor time of a call."""
    start = time.process_time()
    call()
    print(f"{name:24} {time.process_time() - start:7.3f} s")


def main() -> None:
    """Time each, then measure the memory of all in a second pass, which tracing slows down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    count = parser.parse_args().items
    orders: list[Order] = []
    timed(f"order of {count} items", lambda: orders.append(build(count)))
    (order,) = orders
    late = 100 * order.steps_per_epoch
    timed("first step of an epoch", lambda: order.plan(0))
    timed("the same epoch's next", lambda: order.plan(1))
    timed("resume, epoch 100", lambda: order.plan(late))
    tracemalloc.start()
    build(count).plan(late)
    print(f"memory at most           {tracemalloc.get_traced_memory()[1] / 2**20:7.1f} MiB")


if __name__ == "__main__":
    main()
