"""The broker's benchmark: ``python -m bench SCENARIO --help``.

Read in this order: ``load.c`` (the theory: a recorder, checked afterwards),
``workload.py`` (what is asked), ``dialect.py`` (in whose language), ``plan.py``
and ``load.py`` (the client), ``servers.py`` (the subjects and their cost),
``recording.py`` and ``analysis.py`` (what arrived), ``scenarios/``, ``report.py``.
"""
