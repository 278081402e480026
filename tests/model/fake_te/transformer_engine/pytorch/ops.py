"""FAKE, see the package: names in annotations of Megatron's."""


class Sequential:
    pass


class FusibleOperation:
    pass
