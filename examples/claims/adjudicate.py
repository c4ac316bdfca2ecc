"""Handlers of the stages 2 and 3: decide the payment of each claim, and sum up the payments of each payer.

The payment rules are invented, but similar to real rules. All amounts are whole cents, and half a cent is rounded up.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

# Share of a service line's charge that a payer allows, in percent, by the first characters of the procedure code.
FEE_PERCENT = {"99": 80, "9": 75, "8": 60, "7": 70, "2": 65, "1": 65, "J": 85, "G": 90}
OTHER_FEE_PERCENT = 50


class Plan(NamedTuple):
    """Patient's share of the allowed amount: the copay, and a percentage of the rest."""

    copay_cents: int
    coinsurance_percent: int


# The keys are the kinds of coverage that a claim states in the X12 element SBR09.
PLANS = {
    "CI": Plan(2500, 10),  # commercial
    "BL": Plan(2000, 15),  # Blue Cross, Blue Shield
    "HM": Plan(1500, 0),  # health maintenance organisation
    "MB": Plan(0, 20),  # Medicare part B
    "MC": Plan(300, 0),  # Medicaid
}
OTHER_PLAN = Plan(3000, 20)


def adjudicate(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one record per claim of a parsed file, in the order of the claims in the file."""
    records = []
    seen: set[tuple[str, str]] = set()
    for claim in item["claims"]:
        key = (claim["provider"], claim["id"])
        records.append(decide(claim, repeated=key in seen))
        seen.add(key)
    return records


def decide(claim: dict[str, Any], *, repeated: bool) -> dict[str, Any]:
    """Return the record of one claim. A claim is denied, paid, or pended until a person reviews the claim."""
    status, reason, allowed_cents, paid_cents = "denied", "", 0, 0
    if repeated:
        reason = "duplicate"
    elif claim["charge_cents"] <= 0:
        reason = "no charge"
    elif not claim["diagnoses"]:
        reason = "no diagnosis"
    elif claim["charge_cents"] != sum(line["charge_cents"] for line in claim["lines"]):
        status, reason = "pended", "charge differs from its lines"
    else:
        status = "paid"
        allowed_cents = sum(allowed(line) for line in claim["lines"])
        paid_cents = allowed_cents - patient_share(allowed_cents, claim["filing"])
    return {
        "payer": claim["payer"],
        "payer_name": claim["payer_name"],
        "claim": claim["id"],
        "charge_cents": claim["charge_cents"],
        "allowed_cents": allowed_cents,
        "paid_cents": paid_cents,
        "status": status,
        "reason": reason,
    }


def allowed(line: dict[str, Any]) -> int:
    """Return the part of a service line's charge that the payer accepts, in cents."""
    code = line["procedure"]
    share = FEE_PERCENT.get(code[:2]) or FEE_PERCENT.get(code[:1], OTHER_FEE_PERCENT)
    return percent(line["charge_cents"], share)


def patient_share(allowed_cents: int, filing: str) -> int:
    """Return the patient's share of the allowed amount, in cents."""
    plan = PLANS.get(filing, OTHER_PLAN)
    copay_cents = min(plan.copay_cents, allowed_cents)
    return copay_cents + percent(allowed_cents - copay_cents, plan.coinsurance_percent)


def percent(amount_cents: int, share: int) -> int:
    """Return `share` percent of the amount, with half a cent rounded up."""
    return (amount_cents * share + 50) // 100


def totals(item: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the totals of one payer's month. `item` contains the payer's records of all files."""
    statuses = Counter(record["status"] for record in item)
    reasons = Counter(record["reason"] for record in item if record["reason"])
    return {
        "payer": item[0]["payer"],
        # Claims with one payer id may spell the payer's name in several ways.
        "payer_name": " / ".join(sorted({record["payer_name"] for record in item})),
        "claims": len(item),
        "charge_cents": sum(record["charge_cents"] for record in item),
        "allowed_cents": sum(record["allowed_cents"] for record in item),
        "paid_cents": sum(record["paid_cents"] for record in item),
        "paid": statuses["paid"],
        "denied": statuses["denied"],
        "pended": statuses["pended"],
        "reasons": dict(sorted(reasons.items())),
    }
