"""The input contract: what a record must be, said once (`spec`), checked exactly (`exact`) and fast (`vectorised`)."""
