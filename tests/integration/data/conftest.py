from tests.helpers.cache_fixtures import cache  # noqa: F401 - a fixture
