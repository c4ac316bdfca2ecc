"""Seeded example data together with what is true about it.

Every function writes the same bytes for the same arguments, and its facts are counted while the
data is made: nothing here reads a file back, so an example's answer is checked independently.
"""

from batchlab.datagen.claims import ClaimsFacts, PayerFacts, write_claims
from batchlab.datagen.records import RecordsFacts, write_records
from batchlab.datagen.rides import MonthFacts, RidesFacts, write_rides

__all__ = [
    "ClaimsFacts",
    "MonthFacts",
    "PayerFacts",
    "RecordsFacts",
    "RidesFacts",
    "write_claims",
    "write_records",
    "write_rides",
]
