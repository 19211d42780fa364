"""What `pytest --pyargs srm_conformance` collects: see `srm_conformance.plugin`. Nothing stands here."""
