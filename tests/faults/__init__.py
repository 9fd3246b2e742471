"Faults on purpose: each module has a short form that a test runs, and a long form: `python -m tests.faults.NAME --all`"
