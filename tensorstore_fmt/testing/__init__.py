"""For tests, also of others: storages that count and fail, real servers, writers without pauses."""
