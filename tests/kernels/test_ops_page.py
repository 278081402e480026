"""The examples of the ops run as they are printed, and docs/ops.md is what the docstrings say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re

import ops_page
import pytest

import r1kernels

FUNCTIONS = [name for name in r1kernels.__all__ if inspect.isfunction(getattr(r1kernels, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_prints_what_it_says_and_that_is_not_nothing(name):
    function = getattr(r1kernels, name)
    module = importlib.import_module(function.__module__)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=dict(vars(module)))
    assert test.examples, f"{name} has no example"
    failed = []
    doctest.DocTestRunner(verbose=False).run(test, out=failed.append)
    assert failed == []
    printed = "".join(example.want for example in test.examples)
    assert any(float(number) for number in re.findall(r"-?\d+\.?\d*", printed))


def test_the_page_is_made_from_the_docstrings():
    assert ops_page.PAGE.read_text() == ops_page.page(), "docs/ops.md is out of date: make docs"
    assert len(FUNCTIONS) > 20
