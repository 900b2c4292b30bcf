"""When lost images are an outage of the network."""

from __future__ import annotations

import pytest

from megatron_atum.data.converters.drafts import Lost, Url
from megatron_atum.data.converters.reach import Reach
from megatron_atum.errors import DataError

FOUND, URL = b"an image", Url("http://a.example/1")


def test_only_images_that_were_asked_for_count_for_an_outage() -> None:
    reach = Reach()
    reach.add([b"in the file"] * 80, [FOUND] * 80)
    reach.add([URL] * 20, [Lost("dns")] * 11 + [FOUND] * 9)
    with pytest.raises(DataError, match=r"a: 11 of 20 images could not be reached \(dns 11\)"):
        reach.check("a", 0.5)
    reach.check("a", 0.55)


@pytest.mark.parametrize("reason", ["dns", "connection", "timeout", "http_408", "http_429", "http_500", "http_503"])
def test_reasons_that_may_pass(reason: str) -> None:
    reach = Reach()
    reach.add([URL] * 20, [Lost(reason)] * 20)
    with pytest.raises(DataError, match="check the network and start again, or raise --max-unreachable"):
        reach.check("a", 0.5)
    reach.check("a", 1.0)


@pytest.mark.parametrize("reason", ["http_404", "http_403", "tls", "opted_out", "not_in_store", "connection_x"])
def test_reasons_that_stay(reason: str) -> None:
    reach = Reach()
    reach.add([URL] * 20, [Lost(reason)] * 20)
    reach.check("a", 0.0)


def test_of_few_images_most_may_be_gone_by_chance() -> None:
    reach = Reach()
    reach.add([URL] * 19, [Lost("dns")] * 19)
    reach.check("a", 0.5)
