from srm_conformance import Conformance


class TestTemplate(Conformance):
    backend = "template"
