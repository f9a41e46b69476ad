"""Options of a run: the policies to compare, admission rules before an engine, slowdowns, and accepted drafts."""
