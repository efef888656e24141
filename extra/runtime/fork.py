"""What a fork of this process may not do."""
import os
from tinydet.errors import UserError


def refuse_in_fork(owner: int) -> None:
  """UserError where this is not process `owner` but a fork of it: devices, their threads and the memory that kernels write to are that one's."""
  if os.getpid() != owner:
    raise UserError(f"process {os.getpid()} is a fork of {owner}, which had opened its device: networks cannot run in both; start processes afresh, "
                    'with multiprocessing.get_context("spawn"), or fork before the first picture')
