"""The page that operators open first, and what it and `headrace status --watch` read. No Ray in here."""
