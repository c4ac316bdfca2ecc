"""The five ports, and the two seams inside the worker and the fleet, as Protocols.

A port takes and returns plain data and knows no policy. A difference between backends is a fact
in a capability record, never a method that raises. All times are seconds unless a name says
otherwise; epoch times come from the Clock.
"""

from batchlab.ports.ledger import Ledger
from batchlab.ports.outside import (
    ANY_MACHINE,
    MAX_BATCH,
    MAX_DELAY_S,
    MAX_MESSAGE_BYTES,
    MAX_VISIBILITY_S,
    MAX_WAIT_S,
    Clock,
    Depth,
    Fleet,
    Ids,
    Launcher,
    Message,
    Notice,
    Notices,
    ObjectInfo,
    Objects,
    Outgoing,
    Queue,
    QueueSpec,
)
from batchlab.ports.rows import (
    BundleRecord,
    Cut,
    Ending,
    Folded,
    JobRecord,
    JobRows,
    Lease,
    Past,
    Reopening,
    Round,
    StageRecord,
    Written,
)

__all__ = [
    "ANY_MACHINE",
    "MAX_BATCH",
    "MAX_DELAY_S",
    "MAX_MESSAGE_BYTES",
    "MAX_VISIBILITY_S",
    "MAX_WAIT_S",
    "BundleRecord",
    "Clock",
    "Cut",
    "Depth",
    "Ending",
    "Fleet",
    "Folded",
    "Ids",
    "JobRecord",
    "JobRows",
    "Launcher",
    "Lease",
    "Ledger",
    "Message",
    "Notice",
    "Notices",
    "ObjectInfo",
    "Objects",
    "Outgoing",
    "Past",
    "Queue",
    "QueueSpec",
    "Reopening",
    "Round",
    "StageRecord",
    "Written",
]
