"""Two processes: in one torch computes what is expected, in the other it cannot."""

import argparse
import collections
import multiprocessing
from multiprocessing.connection import Connection

import torch

from tests.parity.draws import FUNCTIONS, Call, draw_call, draw_calls

CHUNK = 100  # calls whose results travel together
SHOWN = 20  # differences that are printed


def calls_of(options: argparse.Namespace) -> list[Call]:
    functions = options.function or list(FUNCTIONS)
    if options.number is not None:
        return [draw_call(function, options.number) for function in functions]
    return draw_calls(options.calls, functions)


def send_expected(options: argparse.Namespace, sender: Connection) -> None:
    """The process in which torch computes."""
    from tests.parity.expected import expected

    torch.set_num_threads(1)
    calls = calls_of(options)
    for begin in range(0, len(calls), CHUNK):
        sender.send([expected(call) for call in calls[begin : begin + CHUNK]])


def compare(options: argparse.Namespace, receiver: Connection) -> int:
    """The process in which torch's kernels raise."""
    from tests.parity.compare import problem
    from tests.parity.expected import Refusal
    from tests.support.forbid import forbid_torchs_kernels

    torch.set_num_threads(1)
    forbid_torchs_kernels()
    calls, counts, differences = calls_of(options), collections.Counter(), 0
    for begin in range(0, len(calls), CHUNK):
        for call, truth in zip(calls[begin : begin + CHUNK], receiver.recv(), strict=False):
            found = problem(call, truth)
            counts[call.function, isinstance(truth, Refusal)] += 1
            differences += found is not None
            if found and differences <= SHOWN:
                print(f"{call}\n    {found}")
    for function in dict.fromkeys(call.function for call in calls):
        print(f"{function}: {counts[function, False]} calls compared, {counts[function, True]} refused by both")
    print(f"{len(calls)} calls, {differences} differences")
    return int(differences > 0)


def run(options: argparse.Namespace) -> int:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    context.Process(target=send_expected, args=(options, sender), daemon=True).start()
    sender.close()
    return compare(options, receiver)
