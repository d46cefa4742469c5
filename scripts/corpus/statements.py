"""Documents in which SQL statements are explained, as a handbook would explain them."""

from __future__ import annotations

from random import Random

from . import words as w

# Column name -> how its values are made.  Number columns can be compared and added up.
TEXT_COLUMNS = {
    "name": w.person,
    "city": w.city,
    "country": lambda r: r.choice(w.COUNTRIES),
    "owner": w.person,
    "title": w.venue,
    "author": w.person,
    "teacher": w.person,
    "captain": w.person,
    "colour": lambda r: r.choice(w.COLOURS),
    "cuisine": lambda r: r.choice(w.CUISINES),
    "team": w.city,
    "coach": w.person,
    "material": lambda r: r.choice(["wood", "stone", "iron", "glass", "paper", "clay"]),
    "artist": w.person,
    "language": lambda r: r.choice(w.CUISINES),
    "airline": w.invented,
    "driver": w.person,
}
NUMBER_COLUMNS = w.several(
    "year price rooms stars age weight height length pages goals points seats speed score rank "
    "distance population members depth salary wins floors"
)
TABLES = w.several(
    "hotels players books ships teams schools towns films songs farms planes bridges trains "
    "museums rivers lakes students doctors shops games races flights houses cars birds trees"
)
AGGREGATES = {
    "COUNT": ["counts", "gives the number of"],
    "MAX": ["finds the highest", "gives the largest"],
    "MIN": ["finds the lowest", "gives the smallest"],
    "AVG": ["gives the average", "works out the mean"],
    "SUM": ["adds up the", "gives the total"],
}

Condition = tuple[str, str, str]


def _condition(rng: Random, columns: list[str]) -> Condition:
    column = rng.choice(columns)
    if column in TEXT_COLUMNS:
        return column, "=", TEXT_COLUMNS[column](rng)
    return column, rng.choice(["=", ">", "<", ">", "<"]), w.number(rng)


def _condition_sql(condition: Condition) -> str:
    column, operator, value = condition
    return f"{column} {operator} {value}" if value.isdigit() else f"{column} {operator} '{value}'"


def _condition_words(rng: Random, condition: Condition) -> str:
    column, operator, value = condition
    how = {
        "=": ["is", "equals"],
        ">": ["is more than", "is above"],
        "<": ["is less than", "is below"],
    }
    return f"{column} {rng.choice(how[operator])} {value}"


def _statement(rng: Random, table: str, columns: list[str]) -> tuple[str, str]:
    """A statement and what it does, in words."""
    conditions = [_condition(rng, columns) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
    if len(conditions) == 2 and conditions[0][0] == conditions[1][0]:
        conditions.pop()
    column = rng.choice(columns)
    numbers = [c for c in columns if c in NUMBER_COLUMNS]
    if numbers and rng.random() < 0.4:
        function = rng.choice(list(AGGREGATES))
        column = "*" if function == "COUNT" else rng.choice(numbers)
        selected = f"{function}({column})"
        does = rng.choice(AGGREGATES[function])
        does += f" {table}" if function == "COUNT" else f" {column} of the {table}"
    else:
        selected = column
        does = rng.choice(
            [f"lists the {column} of the {table}", f"shows the {column} of every row in {table}"]
        )
    sql = f"SELECT {selected} FROM {table}"
    if conditions:
        sql += " WHERE " + " AND ".join(_condition_sql(c) for c in conditions)
        does += rng.choice([" whose ", " where the "])
        does += " and whose ".join(_condition_words(rng, c) for c in conditions)
    return sql, does


def _columns(rng: Random) -> list[str]:
    columns = w.some(rng, list(TEXT_COLUMNS), 1, 3) + w.some(rng, NUMBER_COLUMNS, 1, 3)
    rng.shuffle(columns)
    return columns


def handbook(rng: Random) -> str:
    """A table is introduced, then a few statements on it are explained."""
    table, columns = rng.choice(TABLES), _columns(rng)
    lines = [
        rng.choice(
            [
                f"The table {table} has the columns {w.listed(columns)}.",
                f"Every row of {table} keeps {w.listed(columns)}.",
                f"CREATE TABLE {table} ({', '.join(columns)});",
            ]
        )
    ]
    for _ in range(rng.randint(1, 3)):
        sql, does = _statement(rng, table, columns)
        lines.append(
            rng.choice(
                [
                    f"The statement {sql} {does}.",
                    f"{sql}; -- {does}",
                    f"What {does}? It is the statement {sql};",
                    f"One statement {does}: {sql}.",
                    f"Here is how one {does}:\n    {sql}",
                ]
            )
        )
    return rng.choice([" ", "\n"]).join(lines)


def rows(rng: Random) -> str:
    """Rows are inserted and then looked up."""
    table, text, count = (
        rng.choice(TABLES),
        rng.choice(list(TEXT_COLUMNS)),
        rng.choice(NUMBER_COLUMNS),
    )
    held = [(TEXT_COLUMNS[text](rng), w.number(rng)) for _ in range(rng.randint(2, 4))]
    lines = [
        f"INSERT INTO {table} ({text}, {count}) VALUES ('{name}', {value});" for name, value in held
    ]
    name, value = rng.choice(held)
    lines.append(f"SELECT {count} FROM {table} WHERE {text} = '{name}';")
    lines.append(rng.choice([f"The answer is {value}.", f"It returns {value}.", f"-> {value}"]))
    return "\n".join(lines)
