"""What a run may be told: the policies to compare, rules before an engine, slowdowns, and accepted drafts."""
