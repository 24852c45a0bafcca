"""What a person reads: tables, sheets, pages, cards."""
