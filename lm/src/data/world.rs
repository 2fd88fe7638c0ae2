//! Facts of the world: countries and cities of GeoNames (CC BY 4.0).

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::lines::Lines;
use super::{Dataset, Example, Fact, Hash};
use crate::error::{LmError, Result};

/// A property of a country or of a city, and the ways to ask for it.
#[derive(Clone, Copy, Debug)]
pub struct Relation {
    /// Its name.
    pub name: &'static str,
    /// Questions; `{}` is the place of the subject.
    pub phrasings: [&'static str; 4],
    column: &'static str,
}

/// All properties: those of countries first, then those of cities.
pub const RELATIONS: [Relation; 7] = [
    Relation {
        name: "capital",
        phrasings: [
            "What is the capital of {}?",
            "{} has which capital?",
            "Which city is the capital of {}?",
            "Name the capital city of {}.",
        ],
        column: "capital",
    },
    Relation {
        name: "continent",
        phrasings: [
            "What continent is {} on?",
            "On which continent does {} lie?",
            "{} belongs to which continent?",
            "Name the continent of {}.",
        ],
        column: "continent",
    },
    Relation {
        name: "currency",
        phrasings: [
            "What currency is used in {}?",
            "{} uses which currency?",
            "Which money do people in {} pay with?",
            "Name the currency of {}.",
        ],
        column: "currency",
    },
    Relation {
        name: "internet domain",
        phrasings: [
            "What is the internet domain of {}?",
            "Which top-level domain does {} have?",
            "{} uses which internet domain?",
            "Name the internet domain of {}.",
        ],
        column: "tld",
    },
    Relation {
        name: "calling code",
        phrasings: [
            "What is the calling code of {}?",
            "Which calling code do you dial for {}?",
            "{} has which calling code?",
            "Name the calling code of {}.",
        ],
        column: "calling_code",
    },
    Relation {
        name: "country",
        phrasings: [
            "What country is {} in?",
            "In which country does {} lie?",
            "{} is a city of which country?",
            "Name the country of {}.",
        ],
        column: "country_iso2",
    },
    Relation {
        name: "time zone",
        phrasings: [
            "What time zone is {} in?",
            "Which time zone does {} use?",
            "{} keeps the time of which zone?",
            "Name the time zone of {}.",
        ],
        column: "timezone",
    },
];

/// How many of [`RELATIONS`] are of countries.
const OF_COUNTRIES: usize = 5;

pub(super) fn load(folder: &Path, limit: usize, seed: u64) -> Result<Dataset> {
    if limit == 0 {
        return Err(LmError::Training("0 facts are none to learn".to_owned()));
    }
    let countries = Table::read(&folder.join("countries.tsv"))?;
    let cities = Table::read(&folder.join("cities.tsv"))?;
    let mut dataset = Dataset::default();

    let (name, iso2) = (countries.column("name")?, countries.column("iso2")?);
    let names: HashMap<&str, &str> = countries.rows.iter().map(|r| (r[iso2].as_str(), r[name].as_str())).collect();
    let (of_countries, of_cities) = RELATIONS.split_at(OF_COUNTRIES);
    for (relation, column) in countries.columns(of_countries)? {
        for row in &countries.rows {
            if !row[column].is_empty() && dataset.facts.len() < limit {
                add(&mut dataset, relation, &row[name], &row[column], seed);
            }
        }
    }

    // Names of places are not unique: a question about one of several San Fernandos has no answer.
    let (name, population) = (cities.column("name")?, cities.column("population")?);
    let (mut seen, mut several) = (HashSet::new(), HashSet::new());
    for row in &cities.rows {
        if !seen.insert(row[name].as_str()) {
            several.insert(row[name].as_str());
        }
    }
    let mut order: Vec<(u64, &Vec<String>)> = Vec::new();
    for (at, row) in cities.rows.iter().enumerate() {
        let people = row[population].parse().map_err(|_| {
            // The header is line 1.
            LmError::line(&cities.path, at + 2, format!("field `population` is `{}`, no number", row[population]))
        })?;
        order.push((people, row));
    }
    // A stable sort: equal populations stay in the file's order.
    order.sort_by_key(|(people, _)| core::cmp::Reverse(*people));
    let columns = cities.columns(of_cities)?;
    for (_, row) in order {
        if several.contains(row[name].as_str()) {
            continue;
        }
        for &(relation, column) in &columns {
            if dataset.facts.len() >= limit {
                return Ok(dataset);
            }
            let answer = match relation.name {
                "country" => names.get(row[column].as_str()).copied().unwrap_or_default(),
                _ => row[column].as_str(),
            };
            if !answer.is_empty() {
                add(&mut dataset, relation, &row[name], answer, seed);
            }
        }
    }
    Ok(dataset)
}

/// Adds a fact in all its phrasings, one of them held out.
fn add(dataset: &mut Dataset, relation: &Relation, subject: &str, answer: &str, seed: u64) {
    let fact = dataset.facts.len();
    let answers = vec![answer.to_owned()];
    dataset.facts.push(Fact { subject: subject.to_owned(), relation: relation.name, answers: answers.clone() });
    let mut hash = Hash::new(seed);
    hash.text(relation.name);
    hash.text(subject);
    let held_out = hash.finish() % relation.phrasings.len() as u64;
    for (i, phrasing) in (0u64..).zip(relation.phrasings) {
        let question = phrasing.replace("{}", subject);
        let example = Example { question, answers: answers.clone(), fact };
        if i == held_out { &mut dataset.held_out } else { &mut dataset.train }.push(example);
    }
}

/// A tab-separated file with a header.
struct Table {
    path: std::path::PathBuf,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn read(path: &Path) -> Result<Self> {
        let mut lines = Lines::open(path)?;
        let split = |line: &str| line.split('\t').map(str::to_owned).collect::<Vec<_>>();
        let header = match lines.next()? {
            Some(line) if !line.is_empty() => split(&line),
            _ => return Err(LmError::file(path, "has no header line")),
        };
        let mut rows = Vec::new();
        while let Some(line) = lines.next()? {
            let row = split(&line);
            if row.len() != header.len() {
                return Err(lines.error(format!("expected {} fields, found {}", header.len(), row.len())));
            }
            rows.push(row);
        }
        if rows.is_empty() {
            return Err(LmError::file(path, "has no rows"));
        }
        Ok(Self { path: path.to_owned(), header, rows })
    }

    fn column(&self, name: &str) -> Result<usize> {
        let found = self.header.iter().position(|column| column == name);
        found.ok_or_else(|| LmError::line(&self.path, 1, format!("the header has no column `{name}`")))
    }

    fn columns<'a>(&self, relations: &'a [Relation]) -> Result<Vec<(&'a Relation, usize)>> {
        relations.iter().map(|relation| Ok((relation, self.column(relation.column)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNTRIES: &str =
        "name\tiso2\tcapital\tcontinent\tcurrency\ttld\tcalling_code\nFrance\tFR\tParis\tEurope\tEuro\t.fr\t33\n";
    const CITIES: &str =
        "name\tcountry_iso2\tpopulation\ttimezone\nLyon\tFR\t5\tEurope/Paris\nParis\tFR\t9\tEurope/Paris\n";

    fn load_text(countries: &str, cities: &str) -> Result<Dataset> {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("countries.tsv"), countries).expect("a file");
        std::fs::write(folder.path().join("cities.tsv"), cities).expect("a file");
        load(folder.path(), 100, 1)
    }

    #[test]
    fn the_most_populous_city_comes_first() {
        let data = load_text(COUNTRIES, CITIES).expect("facts");
        let subjects: Vec<_> = data.facts.iter().map(|f| f.subject.as_str()).collect();
        assert_eq!(subjects, ["France", "France", "France", "France", "France", "Paris", "Paris", "Lyon", "Lyon"]);
        assert_eq!(data.facts[5].answers, ["France"]);
    }

    #[test]
    fn names_of_several_places_are_left_out() {
        let cities = format!("{CITIES}Lyon\tUS\t1\tAmerica/New_York\n");
        let data = load_text(COUNTRIES, &cities).expect("facts");
        assert!(data.facts.iter().all(|f| f.subject != "Lyon"));
    }

    #[test]
    fn malformed_files_are_named() {
        for (countries, cities, expected) in [
            ("", CITIES, "countries.tsv: has no header line"),
            ("name\tiso2\n", CITIES, "countries.tsv: has no rows"),
            ("name\tiso2\nA\tB\n", CITIES, "countries.tsv:1: the header has no column `capital`"),
            (
                COUNTRIES,
                "name\tcountry_iso2\tpopulation\ttimezone\nLyon\tFR\t5\n",
                "cities.tsv:2: expected 4 fields, found 3",
            ),
            (
                COUNTRIES,
                "name\tcountry_iso2\tpopulation\ttimezone\nLyon\tFR\tmany\tEurope/Paris\n",
                "cities.tsv:2: field `population` is `many`",
            ),
        ] {
            let error = load_text(countries, cities).expect_err("malformed").to_string();
            assert!(error.contains(expected), "{error} does not say {expected}");
        }
    }
}
