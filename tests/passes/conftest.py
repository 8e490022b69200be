import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the golden files of tests/passes"
    )


@pytest.fixture
def is_updating(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--update-golden", default=False)
