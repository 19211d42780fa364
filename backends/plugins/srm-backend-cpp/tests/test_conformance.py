from srm_conformance import Conformance


class TestCpp(Conformance):
    backend = "cpp"
