"""Scripts of the commands in the docs, in the format of `doc_commands.lines`, and the tests that
run the other commands.
"""

# ruff: noqa: E501
from __future__ import annotations

import re

# --- A grid on a laptop --------------------------------------------------------------------------

FIRST = """
batchlab init myjob
batchlab run myjob/job.yaml --out results
cat results/total.jsonl
batchlab run myjob/job.yaml --backend sim --seed 7
batchlab doctor
"""

STANDING = """
+ batchlab init pipeline
batchlab grid up --log-format json ;; batchlab grid up --port 8080 ;; batchlab grid up --pool default:0-4x1 --pool large:0-2x8 ;; batchlab grid up --pool default:0-1x8,gpus=2 => batchlab grid up --log-format json --port {port} --pool default:0-4x1 --pool large:0-1x8,gpus=2
batchlab job submit myjob/job.yaml
batchlab job watch last
batchlab job list
batchlab job show last
batchlab job why last
batchlab job results last --out results
batchlab grid status
batchlab grid status --as-if-aws
batchlab grid activities default
batchlab grid open
batchlab grid cap 50USD
batchlab user add alice --role submit --expires 30d
batchlab user list
batchlab user role alice operate
+ batchlab job list --owner alice
batchlab audit --since 24h
batchlab audit --user alice --action job --outcome refused --json
batchlab user revoke alice
batchlab job submit pipeline/job.yaml --max-cost 5USD
batchlab job watch last --as-if-aws
batchlab job show last --as-if-aws
batchlab share set research --weight 0.5
+ batchlab share set research --weight 0.5 --max-slots 16
batchlab share policy --decay 1h --reservation 10%
+ batchlab share policy --only-listed yes
batchlab share list
+ batchlab share remove research
+ batchlab share remove --all
+ batchlab grid drain default
+ batchlab job submit pipeline/job.yaml
batchlab job cap last 10USD
batchlab job cap last none
+ batchlab grid scale default --auto
+ batchlab job watch last
! batchlab run job.yaml --as-if-aws
batchlab cost estimate job.yaml --seconds 2-5 --pool default:0-20x2 --instance-type c7g.large --spot 80
batchlab cost estimate pipeline/job.yaml --seconds 2-5 --pool default:0-10x2 --instance-type m7i.large --spot 100
! batchlab run job.yaml --max-cost 5USD
batchlab cost bill last
batchlab cost bill last --instance-type c7g.large --json
"""

FAILURES = """
batchlab job failures last
batchlab job failures last --fingerprint db97f1813d04 => batchlab job failures last --fingerprint {fingerprint}
batchlab job failures JOB => batchlab job failures {job}
batchlab job show last parse/3
! batchlab job replay-task last parse/3
batchlab job logs last
batchlab job logs last parse/3
batchlab job logs last --failed
batchlab job logs last --follow --since 10m
batchlab job logs last --follow --json
batchlab job retry last --fingerprint db97f1813d04 => batchlab job retry last --fingerprint {fingerprint}
? batchlab job watch last
batchlab job retry last --tasks parse/3,7-9 --tasks price/0
? batchlab job watch last
batchlab job retry last --task parse/3 --input corrected.csv
? batchlab job watch last
batchlab job retry JOB => batchlab job retry {job}
? batchlab job watch last
"""

REPORTS = """
batchlab report query
batchlab report query summary last
batchlab report query slowest_tasks last
batchlab report query retries month-end-0123456789 --json => batchlab report query retries {job} --json
+ batchlab report query "select stage, median(run_s) from tasks group by stage" last
batchlab report query "select stage, quantile_cont(run_s, 0.95) as p95_s from tasks group by stage" last
batchlab report query "from scaling order by at_s" last --csv
batchlab report html last
batchlab report html shop-0123456789 --out monday.html => batchlab report html {job} --out monday.html
batchlab report pull month-end-0123456789 --backend aws --out runs => batchlab report pull {job} --backend local --out runs
batchlab report pull last --backend aws --out aws-runs => batchlab report pull last --backend local --out aws-runs
batchlab report query cost_by_stage runs
batchlab report html aws-runs
+ batchlab report pull {job} --out runs/before
+ batchlab report pull {job} --out runs/after
+ batchlab report pull {job} --out runs/main
batchlab report pull last --out runs/branch
? batchlab report diff runs/before runs/after
? batchlab report diff runs/june runs/july --threshold 10% => batchlab report diff runs/before runs/after --threshold 10%
? batchlab report diff a1,a2,a3 b1,b2,b3 --threshold 10% --markdown => batchlab report diff {job},{earlier} {earlier},{job} --threshold 10% --markdown
? batchlab report diff runs/main runs/branch --fail-on 'parse.p95 > 15%' --fail-on 'cost > 5%' --json
? batchlab report diff runs/main runs/branch --threshold 10% --markdown > comment.md
batchlab scenario record last --out march.yaml
batchlab scenario record last --out next-month.yaml
batchlab scenario record claims-3f2a91b0c7 claims-9e01d4a2f8 --name two-claims => batchlab scenario record {job} {earlier} --name two-claims
"""

SCHEDULES = """
batchlab schedule add job.yaml --cron '0 2 * * 1-5' --timezone Europe/Berlin
batchlab schedule list
+ batchlab schedule show job --count 5
batchlab schedule show job
+ batchlab schedule delete job
batchlab schedule add job.yaml --cron '0 6 * * *' --prewarm 10m --capacity 8
+ batchlab schedule add myjob/job.yaml --cron '0 2 * * 1-5' --timezone Europe/Berlin --prewarm 10m
+ batchlab schedule delete first-claims
batchlab schedule add pipeline/job.yaml --cron '0 2 * * 1-5' --timezone Europe/Berlin --prewarm 10m --max-cost 5USD
batchlab notify list
batchlab notify test ops
batchlab notify log --json
batchlab grid rebuild-ledger
batchlab grid down
"""

# --- Without a grid ------------------------------------------------------------------------------

PRICES_AND_PEAKS = """
batchlab cost prices
batchlab cost prices m7i.large c7g.large --json
batchlab cost refresh-prices --from prices.csv --date 2026-07-20
batchlab scenario list
batchlab scenario faults
batchlab scenario faults --backend localstack
batchlab scenario check claims-month-end
batchlab scenario simulate claims-month-end --seed 8 => batchlab scenario simulate peak.yaml --seed 8
batchlab scenario simulate peak.yaml --like localstack
batchlab scenario simulate peak.yaml --out peak.json
batchlab scenario simulate peak.yaml --log peak.log
batchlab scenario simulate two-tenants --no-shares => batchlab scenario simulate peak.yaml --no-shares
batchlab scenario simulate two-tenants --out with.json => batchlab scenario simulate peak.yaml --out with.json
batchlab scenario simulate two-tenants --no-shares --out without.json => batchlab scenario simulate peak.yaml --no-shares --out without.json
batchlab scenario compare with.json without.json
batchlab scenario simulate ci/month-end.yaml --json > verdict.json || exit 1
batchlab scenario record --from peak.json --out peak-as-it-was.yaml
batchlab scenario plan evening.yaml --deadline 40m --json => batchlab scenario plan evening.yaml --deadline 40m --json --runs 4 --seeds 2 --jobs 1
"""

COMPARED = """
+ batchlab scenario simulate peak.yaml --like local --compress 600 --out monday.json
+ batchlab scenario simulate peak.yaml --like local --compress 600 --seed 2 --out tuesday.json
batchlab scenario calibrate monday.json tuesday.json --out local.json
batchlab scenario simulate claims-month-end --like local --calibration local.json => batchlab scenario simulate peak.yaml --like local --calibration local.json
? batchlab scenario plan claims-month-end --deadline 10h --like local --calibration local.json => batchlab scenario plan peak.yaml --deadline 10m --like local --calibration local.json --runs 4 --seeds 1 --jobs 1
batchlab scenario simulate claims-month-end --compress 60 --like local --out forecast.json => batchlab scenario simulate peak.yaml --compress 600 --like local --out forecast.json
batchlab scenario compare forecast.json fact.json => batchlab scenario compare forecast.json monday.json
"""

SIMULATED = """
batchlab sim fuzz --seeds 500 => batchlab sim fuzz --seeds 1
batchlab sim fuzz --seeds 10000 --report long-run.md => batchlab sim fuzz --seeds 1 --report long-run.md
batchlab scenario faults --simulator
batchlab sim replay 7
batchlab sim replay 7 --log events.log
? batchlab sim replay 1234 --only manager-1:41:kill_after,worker-w-1f0c2d3e4a5b6978:7:lost => batchlab sim replay 1234 --only manager-1:41:kill_after,worker-w-1f0c2d3e4a5b6978:7:lost
"""

HERE = (FIRST, STANDING, FAILURES, REPORTS, SCHEDULES, PRICES_AND_PEAKS, COMPARED, SIMULATED)

IN_TESTS = (
    "batchlab --install-completion",
    "batchlab asg interrupt i-0123456789abcdef0 --notice 30",
    "batchlab asg interrupt i-0123456789abcdef0 --notice 30 --endpoint http://127.0.0.1:4580",
    "batchlab asg serve --templates templates.toml --port 4580",
)
"""Commands that the two tests above run without a script."""

# --- Commands that another test runs, and commands without a test --------------------------------

ELSEWHERE = {
    # CI reads these two commands from the README and runs them.
    "python3 -m venv .venv && .venv/bin/pip install -q uv && .venv/bin/uv sync -q --frozen"
    " --no-dev && .venv/bin/batchlab demo": ".ci/run block",
    "python3 -m venv .venv && .venv/bin/pip install -q uv && .venv/bin/uv sync -q --frozen"
    " && .venv/bin/pytest --all": ".ci/run block",
    ".ci/supply dist": ".ci/run supply",
    "uv build": "tests/system/test_installed.py built",
    "batchlab grid up --backend localstack --pool default:0-4x1 --pool media:0-2x1,image=registry.example.com/media:7": (
        "tests/system/test_pool_images.py test_stages_of_one_job_run_in_two_images_on_localstack"
    ),
    "batchlab job replay-task last cut/0": (
        "tests/system/test_pool_images.py test_task_is_replayed_in_the_image_of_its_worker"
    ),
    "batchlab job replay-task last cut/0 --image registry.example.com/media:8": (
        "tests/system/test_pool_images.py test_task_is_replayed_in_the_image_of_its_worker"
    ),
    "batchlab job replay-task last cut/0 --no-image": (
        "tests/system/test_pool_images.py test_task_is_replayed_in_the_image_of_its_worker"
    ),
    "uv tool install dist/batchlab-*.whl": "tests/system/test_installed.py installed",
    "pip install 'batchlab[aws,docker,ministack] @ file:///…/batchlab-….whl'": (
        "tests/system/test_installed.py test_metadata_of_the_package_is_complete"
    ),
    "pip install 'batchlab[otel] @ file:///…/batchlab-….whl'": (
        "tests/system/test_installed.py test_metadata_of_the_package_is_complete"
    ),
    ".venv/bin/python -m tests.support.public_api --accept": "tests/docs/test_public_api.py"
    " test_documented_executor_is_accepted",
    # Tests with emulators run these commands.
    "batchlab run myjob/job.yaml --backend ministack --out results": (
        "tests/system/test_ministack.py test_run_from_nothing_leaves_nothing_running"
    ),
    "batchlab demo --backend ministack": "tests/system/test_ministack.py test_run_from_nothing_leaves_nothing_running",
    "batchlab doctor --backend ministack": "tests/system/test_ministack.py test_doctor_tries_the_emulator_for_real",
    "batchlab grid up --backend ministack --endpoint http://127.0.0.1:4566": (
        "tests/system/test_ministack.py test_a_grid_at_a_named_endpoint_starts_no_emulator"
    ),
    "batchlab grid up --backend ministack --endpoint http://127.0.0.1:4566/month-end --home month-end": (
        "tests/system/test_ministack.py test_a_grid_at_a_named_endpoint_starts_no_emulator"
    ),
    "batchlab conform --endpoint http://127.0.0.1:4566": "tests/system/test_conform.py test_page_matches_the_emulator",
    "batchlab conform --endpoint http://127.0.0.1:4566 --name 'MiniStack 1.5.33'"
    " --markdown docs/contributing/emulators.md": "tests/system/test_conform.py test_page_matches_the_emulator",
    "batchlab conform --endpoint http://127.0.0.1:4566 --needed": "tests/system/test_conform.py"
    " test_existing_bucket_is_used_and_its_objects_are_unchanged",
    "batchlab conform --endpoint http://127.0.0.1:9000 --only 's3-*' --json": (
        "tests/system/test_conform.py test_breakdown_of_the_endpoint_is_not_a_difference"
    ),
    "aws sns create-topic --name batch": "tests/system/test_tour.py test_topic_of_the_emulator_is_notified",
    # Tests with containers run these commands.
    "batchlab doctor --backend localstack": "tests/system/test_containers.py"
    " test_grid_works_with_the_aws_cli_and_leaves_nothing",
    "batchlab grid up --backend localstack": "tests/system/test_containers.py"
    " test_grid_works_with_the_aws_cli_and_leaves_nothing",
    "batchlab gc": "tests/system/test_containers.py test_grid_works_with_the_aws_cli_and_leaves_nothing",
    'eval "$(compose/offline/build.sh)"': ".ci/run images",
    "batchlab scenario replay peak.yaml --backend localstack --compress 60 --out peak.json": (
        "tests/system/test_replay_localstack.py test_a_scenario_with_its_policy_and_a_kill_on_localstack"
    ),
    # Tests of Auto Scaling on one machine run these commands.
    "batchlab conform --service autoscaling --endpoint http://127.0.0.1:4580 --template worker": (
        "tests/system/test_conform_asg.py test_own_endpoint_follows_every_rule"
    ),
    "batchlab conform --endpoint http://127.0.0.1:4580 --service autoscaling": (
        "tests/system/test_conform_asg.py test_missing_template_is_requested"
    ),
    "batchlab conform --service autoscaling --endpoint http://127.0.0.1:5000 --needed": (
        "tests/system/test_conform_asg.py test_page_matches_moto"
    ),
    "batchlab conform --service autoscaling --endpoint http://127.0.0.1:4580 --template worker"
    " --name 'batchlab asg serve' --markdown docs/contributing/asg-endpoint.md": (
        "tests/system/test_conform_asg.py test_own_endpoint_follows_every_rule"
    ),
    # The tests of the following commands run the page's own command with other options.
    "batchlab scenario plan month-end.yaml --deadline 40m --budget '0.10 USD'": (
        "tests/system/test_doc_pages.py test_a_page_can_be_followed"
    ),
    "batchlab scenario plan long-tail --deadline 2h --budget '5 USD'": (
        "tests/system/test_doc_pages.py test_a_page_can_be_followed"
    ),
    "batchlab scenario replay peak.yaml --json > verdict.json || echo red": (
        "tests/system/test_replay_cli.py test_a_replay_is_judged_compared_and_recorded_as_a_scenario"
    ),
    "batchlab scenario replay claims-month-end --compress 600": (
        "tests/system/test_replay_cli.py test_a_replay_is_judged_compared_and_recorded_as_a_scenario"
    ),
    "batchlab scenario replay month-end.yaml --compress 200": (
        "tests/system/test_doc_pages.py test_a_page_can_be_followed"
    ),
    # Others.
    "export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318": (
        "tests/system/test_observed_grid.py test_the_spans_of_a_job_are_one_tree"
    ),
    "batchlab scenario simulate claims-month-end": (
        "tests/scenarios/test_shipped.py test_a_shipped_scenario_passes_its_own_expectations"
    ),
    "batchlab scenario simulate spot-wave": (
        "tests/scenarios/test_shipped.py test_a_shipped_scenario_passes_its_own_expectations"
    ),
    "batchlab cost refresh-prices --from AmazonEC2.csv --region us-east-1": (
        "tests/core/test_price_refresh.py test_awss_own_price_list_as_csv"
    ),
    "python examples/executor/primes.py": "tests/system/test_executor_examples.py"
    " test_program_prints_the_documented_output",
    "python examples/executor/bootstrap.py": "tests/system/test_executor_examples.py"
    " test_program_prints_the_documented_output",
    "python examples/executor/search.py": "tests/system/test_executor_examples.py"
    " test_program_prints_the_documented_output",
}
"""The test that runs a command, or runs a replacement with a shorter input. The value is the test's file and a name in
it."""

WHOLE = {
    "docs/backends.md ## The AWS CLI": "tests/system/test_real_clients.py test_the_commands_of_the_docs_work",
    "examples/sort/README.md": "tests/system/test_examples_end_to_end.py test_sort_of_one_large_file",
    "examples/media/README.md": "tests/system/test_examples_end_to_end.py test_media_keeps_every_frame",
    "examples/transform/README.md": "tests/system/test_examples_end_to_end.py test_transform_keeps_every_ride",
    "examples/claims/README.md": "tests/system/test_examples_end_to_end.py test_claims_totals_match_the_generator",
}
"""The test that follows a whole page, or one section of a page."""

NEEDS_ACCOUNT = re.compile(
    r"batchlab deploy |batchlab .*--backend (aws|gcs)\b|batchlab (gc|conform) --aws|aws (sts|autoscaling) "
    r"|export AWS_ENDPOINT_URL=|gcloud auth |curl .*//truststore\.pki\.rds\.amazonaws\.com/"
)
"""Commands that need an account with AWS or Google Cloud, or a file of AWS.

test_docs.py checks that the commands and options exist. The tests below `system/deploy` run the commands of AWS on
emulated control planes, and `test_gcs.py` runs a grid at a stub of Google Cloud Storage.
"""

DEVELOPERS = (
    ".venv/bin/pytest",
    ".venv/bin/pytest --all",
    "BATCHLAB_AWS_BUDGET_USD=5 .venv/bin/pytest --all -m aws",
    "BATCHLAB_FROM=120 BATCHLAB_SEEDS=2000 pytest -n auto tests/sim/test_fuzz.py",
    "BATCHLAB_LOOKS=write python -m pytest tests/browser/test_page_looks.py tests/browser/test_report_looks.py",
    "python3 -m venv .venv && .venv/bin/pip install -q uv && .venv/bin/uv sync -q --frozen",
    ".ci/oldest",
    "mkdir -p /tmp/bare",
    "unshare --mount --map-root-user .venv/bin/python -m tests.support.bare_posix.enter /tmp/bare "
    ".venv/bin/python -m pytest --all -n 0 tests/worker",
    ".venv/bin/pre-commit install",
    ".venv/bin/ruff format . && .venv/bin/ruff check .",
    ".venv/bin/mypy",
    ".venv/bin/lint-imports",
    ".venv/bin/python -m docs.reference docs",
    ".venv/bin/uv run --only-group docs zensical serve",
    "python benchmarks/page.py --docs",
    "python benchmarks/page.py --growth --docs",
    "python -m benchmarks.peers install",
    "python -m benchmarks.peers run --docs",
    "python benchmarks/gate.py --small",
    "python benchmarks/request_counts.py",
    "python benchmarks/scaling.py --svg docs/images/scaling.svg",
    "python benchmarks/overhead.py",
    "BATCHLAB_POSTGRES_URL=postgresql://… python benchmarks/ledger.py --only postgres",
    "git pull",
    ".venv/bin/uv sync -q --frozen --no-dev --inexact",
    "uv tool install ministack==1.5.33",
    "uv tool install ministack==1.5.33 --with uvicorn,httptools",
    "BIND_HOST=127.0.0.1 GATEWAY_PORT=4566 ministack",
    'export BATCHLAB_MINISTACK="$(command -v ministack)"',
)
"""Commands for developers: benchmarks, other ways to run the tests, updates of reference files, and installations. The
tests check only that the named files exist."""
