"""Effects: loops that do outside work for rows that enter a query."""
