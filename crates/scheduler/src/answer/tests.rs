//! Tables of what models write, and properties that hold for anything they might write.
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

fn auto(raw: &str) -> Answer {
    normalise(raw, &AnswerFormat::Auto)
}

fn options(texts: &[&str]) -> AnswerFormat {
    AnswerFormat::Options(texts.iter().map(|&text| text.to_owned()).collect())
}

fn one_of(texts: &[&str]) -> AnswerFormat {
    AnswerFormat::OneOf(texts.iter().map(|&text| text.to_owned()).collect())
}

#[test]
fn numbers_have_one_form() {
    let table: &[(&str, &[&str])] = &[
        (
            "12",
            &[
                "12",
                "12.0",
                "12.",
                "\\boxed{12}",
                "twelve",
                "Twelve.",
                "+12",
                "012",
                "$12",
                "$12.00",
                "12 apples",
                "12%",
                "**12**",
                "$12$",
                "\\(12\\)",
                "x = 12",
                "3 * 4 = 12",
                "12 km",
                "12km",
                "1.2e1",
                "24/2",
                "\\frac{24}{2}",
                "[12]",
                "\"12\"",
                "`12`",
                "about 12",
                "≈ 12",
                "12 square metres",
                "\\text{12}",
                "{12}",
            ],
        ),
        ("1000", &["1,000", "1000", "1,000.00", "$1,000", "one thousand", "1e3", "10^3=1000", "1{,}000"]),
        ("0.5", &["1/2", ".5", "0.50", "0.5", "\\frac{1}{2}", "\\dfrac12 = 0.5"]),
        ("1/3", &["1/3", "2/6", "\\frac{1}{3}", "\\frac{2}{6}"]),
        ("-5", &["-5", "−5", "minus five", "negative five", "-5.0", "- 5"]),
        ("0", &["0", "-0", "0.0", "zero", "0.000"]),
        ("1234567.89", &["1,234,567.89", "1234567.89", "1.23456789e6"]),
        ("21", &["twenty-one", "twenty one", "21"]),
        ("105", &["one hundred and five", "one hundred five", "105"]),
        ("2300", &["two thousand three hundred", "two thousand, three hundred", "2,300"]),
        ("1000000", &["one million", "1,000,000", "1e6"]),
        ("100000000000000000000000001", &["100000000000000000000000001"]),
    ];
    for (want, forms) in table {
        for form in *forms {
            assert_eq!(auto(form), Answer::Number((*want).to_owned()), "{form}");
        }
    }
}

#[test]
fn what_is_no_number_stays_what_it_is() {
    for raw in [
        "3:30 pm",
        "12 of them",
        "v1.5",
        "x-5",
        "x+5",
        "twenty five six",
        "one two",
        "hundred",
        "and",
        "3rd",
        "1e999",
        "1/0",
        "12 and 13",
        "five and",
        "May 5",
        "zero five",
        "12 may",
    ] {
        assert!(!matches!(auto(raw), Answer::Number(_)), "{raw} became {:?}", auto(raw));
    }
    assert_ne!(auto("x+5"), auto("x-5"));
    assert_eq!(auto("x + 5"), auto("x+5"));
    assert_ne!(auto("0.1"), auto("0.10000000000000001"));
}

#[test]
fn options_have_one_form() {
    for raw in [
        "(B)",
        "B.",
        "B",
        "b",
        "(b)",
        "B)",
        "[B]",
        "Option B",
        "option (b)",
        "the answer B",
        "(B) Paris",
        "B) Paris",
        "**B**",
        "\\boxed{B}",
        "\\text{(B)}",
        "`B`",
        "The correct option (B)",
    ] {
        assert_eq!(auto(raw), Answer::Choice('B'), "{raw}");
    }
    let format = options(&["London", "Paris", "New York"]);
    for raw in [
        "(B)",
        "B. Paris",
        "B: Paris",
        "B - Paris",
        "Paris",
        "paris.",
        "It is Paris",
        "option B, Paris",
        "The answer B",
    ] {
        assert_eq!(normalise(raw, &format), Answer::Choice('B'), "{raw}");
    }
    assert_eq!(normalise("A cat", &format), Answer::Text("cat".into()), "an article is no option");
    assert_eq!(
        normalise("(F)", &format),
        Answer::Choice('F'),
        "an option that is not there is still an answer, of its own"
    );
    assert_eq!(normalise("New York", &options(&["York", "New York"])), Answer::Choice('B'));
    assert_eq!(
        normalise("twelve", &options(&["11", "12.0"])),
        Answer::Choice('B'),
        "an option's text is compared by value"
    );
    assert!(matches!(normalise("London or Paris", &format), Answer::Text(_)), "two options are no choice");
}

#[test]
fn truth_has_one_form() {
    for raw in ["yes", "Yes.", "TRUE", "valid", "Correct!", "**Yes**", "\"true\"", "It is valid."] {
        assert_eq!(auto(raw), Answer::Bool(true), "{raw}");
    }
    for raw in ["no", "No.", "False", "invalid", "incorrect", "not valid", "Wrong"] {
        assert_eq!(auto(raw), Answer::Bool(false), "{raw}");
    }
    let format = one_of(&["valid", "invalid"]);
    for raw in ["invalid", "Invalid.", "The argument is invalid", "no", "Not valid", "No, it is not"] {
        assert_eq!(normalise(raw, &format), Answer::Text("invalid".into()), "{raw}");
    }
    assert_eq!(normalise("yes", &format), Answer::Text("valid".into()));
    assert_eq!(normalise("Yes, because it rains", &AnswerFormat::YesNo), Answer::Bool(true));
    assert_eq!(normalise("It is not valid", &AnswerFormat::YesNo), Answer::Bool(false));
}

#[test]
fn collections_have_one_form() {
    let list = |items: &[&str]| Answer::List(items.iter().map(|&item| item.to_owned()).collect());
    let set = |items: &[&str]| Answer::Set(items.iter().map(|&item| item.to_owned()).collect());
    for raw in ["1, 2, 3", "[1, 2, 3]", "(1,2,3)", "1; 2; 3", "one, two, three", "1.0, 2, and 3", "\\[1, 2, 3\\]"] {
        assert_eq!(auto(raw), list(&["1", "2", "3"]), "{raw}");
    }
    assert_ne!(auto("1, 2"), auto("2, 1"), "a list has an order");
    assert_eq!(auto("{2, 1, 2}"), set(&["1", "2"]));
    assert_eq!(auto("\\{b, a\\}"), auto("{a, b}"));
    assert_eq!(auto("Apple, Pear and Fig"), list(&["apple", "pear and fig"]));
    assert_eq!(normalise("pear, apple", &AnswerFormat::Set), normalise("apple, pear", &AnswerFormat::Set));
    assert_eq!(auto("[]"), Answer::Text("[]".into()));
    assert_eq!(auto("[true, False]"), list(&["yes", "no"]));
}

#[test]
fn dates_have_one_form() {
    for raw in [
        "May 1, 2021",
        "1 May 2021",
        "May 1st, 2021",
        "1st of May 2021",
        "2021-05-01",
        "2021/05/01",
        "Saturday, May 1, 2021",
        "may 01 2021",
    ] {
        assert_eq!(auto(raw), Answer::Date("2021-05-01".into()), "{raw}");
    }
    assert_eq!(auto("05/01/2021"), Answer::Date("5/1/2021".into()));
    assert_eq!(auto("5/1/2021"), auto("05/01/2021"));
    assert_ne!(auto("05/01/2021"), auto("01/05/2021"));
    for raw in ["13/13/2021", "2021-13-01", "1.2.3", "99/99/9999"] {
        assert!(!matches!(auto(raw), Answer::Date(_)), "{raw}");
    }
}

#[test]
fn texts_lose_case_space_punctuation_and_articles() {
    for (a, b) in [
        ("The Eiffel Tower", "eiffel tower."),
        ("New   York", "new york"),
        ("\"Hello, world\"", "hello, world"),
        ("Paris!", "paris"),
        ("well-known", "well known"),
        ("Alice's cat", "alices cat"),
        ("] ) }", "])}"),
        ("3:30 PM", "3:30 pm"),
        ("E = mc^2", "e=mc^2"),
    ] {
        assert_eq!(auto(a), auto(b), "{a} and {b}");
    }
    assert_ne!(auto("] )"), auto(") ]"));
    assert_eq!(auto("2**3"), Answer::Text("2**3".into()), "a power is not bold type");
}

#[test]
fn formats_are_read_from_the_question() {
    let resolve = |question: &str| AnswerFormat::Auto.resolve(question);
    let bbh = "Which is it?\nOptions:\n(A) London\n(B) New York\n(C) Paris";
    assert_eq!(resolve(bbh), options(&["London", "New York", "Paris"]));
    assert_eq!(resolve("Pick: (A) red, (B) blue"), options(&["red", "blue"]));
    assert_eq!(resolve("Which is a fruit: (A) carrot (B) apple?"), options(&["carrot", "apple"]));
    assert_eq!(resolve("Pick one.\nA) red\nB) blue\n\nThink."), options(&["red", "blue"]));
    assert_eq!(resolve("Pick one.\nA. red\nB. blue"), options(&["red", "blue"]));
    assert_eq!(resolve("Is it?\nOptions:\n- valid\n- invalid"), one_of(&["valid", "invalid"]));
    assert_eq!(resolve("Answer yes or no: is 7 prime?"), AnswerFormat::YesNo);
    assert_eq!(resolve("How many apples are left?"), AnswerFormat::Number);
    assert_eq!(resolve("What is 2 + 2?"), AnswerFormat::Auto);
    assert_eq!(resolve("Plan (A) failed."), AnswerFormat::Auto, "one letter is no choice");
    assert_eq!(AnswerFormat::Prose.resolve(bbh), AnswerFormat::Prose, "what the user says holds");
    assert_eq!(options(&["x", "y"]).option('B'), Some("y"));
    assert_eq!(options(&["x", "y"]).option('C'), None);
    assert_eq!(options(&["x"]).option('!'), None);
}

/// What is written, in which format, and what is to be found in it, normalised.
fn extraction_table() -> Vec<(&'static str, AnswerFormat, &'static str)> {
    use AnswerFormat::{Auto, List, Number, YesNo};
    let cities = || options(&["London", "Paris", "Rome"]);
    vec![
        ("\\boxed{12}", Auto, "12"),
        ("So we get \\boxed{\\frac{1}{2}} in the end.", Auto, "0.5"),
        ("First \\boxed{1}, then \\boxed{2}", Auto, "2"),
        ("The box is \\boxed{never closed", Auto, "never closed"),
        ("The answer is 12.", Auto, "12"),
        ("The answer is 12. I hope this helps!", Auto, "12"),
        ("The answer is 12.5 metres. Good luck.", Auto, "12.5"),
        ("Answer: 12", Auto, "12"),
        ("**Answer:** 12", Auto, "12"),
        ("**Answer**: 12", Auto, "12"),
        ("Answer:\n\n12", Auto, "12"),
        ("Final answer = -5", Auto, "-5"),
        ("Answer: -5", Auto, "-5"),
        ("#### 72", Auto, "72"),
        ("Let me think. 3 + 4 = 7", Auto, "7"),
        ("Therefore, the total number of apples that she has now is 7.", Auto, "7"),
        ("The answer is not 5. The answer is 6.", Auto, "6"),
        ("Paris", Auto, "paris"),
        ("I think about it.\n\nParis.\n", Auto, "paris"),
        ("Answer: Paris\n\nQuestion: What is the capital of Spain?\nAnswer: Madrid", Auto, "paris"),
        ("<think>Maybe 5? Answer: 5</think>\nAnswer: 6", Auto, "6"),
        ("7\nEnd with a line: Answer: …", Auto, "7"),
        ("Answer: ...\n7", Auto, "7"),
        ("Answer: <answer>\nAnswer: 7", Auto, "7"),
        ("A: 42", Auto, "42"),
        ("It is 7.\nThis answer is not an answer to the question.\nAnswer: 7", Auto, "7"),
        ("It is 7.\nThe answer is not easy to give", Auto, "answer is not easy to give"),
        // As SmolLM2-135M wrote them.
        ("If we divide 4 apples by 3 bags, we get 2 apples. So, Janet has 2 apples left.", Number, "2"),
        ("She eats 2 apples, so she has 3 x 4 = 12 apples left.", Number, "12"),
        ("12 apples in each bag.\nIf she eats 2, she has 3 x 2 = 6 remaining.\n#### 6\nThe answer is: 6", Number, "6"),
        ("No, answer: \"Lionel Messi scored a three-pointer.\"", YesNo, "no"),
        ("C) Rome.", cities(), "(C)"),
        ("The most appropriate answer is:\n\n(B) Paris", cities(), "(B)"),
        (
            "1. Identify the problem.\n2. Determine the answer: The correct answer is (B) Paris.\n\nSo, it is (B) Paris.",
            cities(),
            "(B)",
        ),
        ("The result is x = 9", Auto, "9"),
        ("The answer is (B).", cities(), "(B)"),
        ("The answer is B", cities(), "(B)"),
        ("The answer is Paris, of course.", cities(), "(B)"),
        ("(B) Paris is the capital.", cities(), "(B)"),
        ("B. Paris", cities(), "(B)"),
        ("B", cities(), "(B)"),
        ("(A) is wrong because of the river. (C) is too far. I choose (B)", cities(), "(B)"),
        ("The correct option is: B", cities(), "(B)"),
        ("Answer: (X)\nIt must be (C)", cities(), "(C)"),
        ("The answer is not (A). It is (C).", cities(), "(C)"),
        ("A good question!\nI would go for Rome.", cities(), "(C)"),
        ("London, Paris and Rome are cities.\nOnly Paris is in France.", cities(), "(B)"),
        ("It has 12 eggs and 3 are broken, which leaves 9 eggs.", Number, "9"),
        ("The answer is 3 + 4 = 7", Number, "7"),
        ("Answer: 18 dollars a day", Number, "18"),
        ("There are $1,234.50 left", Number, "1234.5"),
        ("5 - 8 gives -3", Number, "-3"),
        ("the value x2 is 7, see v1.5", Number, "7"),
        ("Answer: unknown. But 4 is likely", Number, "4"),
        ("Yes, because no bird is a fish.", YesNo, "yes"),
        ("Let us see.\nNo, it is not.", YesNo, "no"),
        ("The answer is no.", YesNo, "no"),
        ("I believe that this is true", YesNo, "yes"),
        ("Answer: yes or no\nIt is not valid.", YesNo, "no"),
        ("(A) London\n(B) Paris\n(C) Rome\nI would say Paris", cities(), "(B)"),
        ("The argument is invalid.", one_of(&["valid", "invalid"]), "invalid"),
        ("Premises hold.\nConclusion: valid", one_of(&["valid", "invalid"]), "valid"),
        ("Answer: No", one_of(&["Yes", "No"]), "no"),
        ("Sorted: \nAnswer: ant, bee, cow", List, "[ant, bee, cow]"),
        ("ant, bee, cow", List, "[ant, bee, cow]"),
    ]
}

#[test]
fn answers_are_found_in_chatter() {
    for (text, format, want) in extraction_table() {
        let judged = judge(text, &format).unwrap_or_else(|| panic!("nothing found in {text:?}"));
        assert_eq!(judged.key.to_string(), want, "in {text:?}, found {:?}", extract(text, &format));
    }
}

#[test]
fn an_answer_of_another_kind_is_told_apart() {
    let fits = |text: &str, format: &AnswerFormat| judge(text, format).unwrap().fits;
    let cities = options(&["London", "Paris"]);
    for (text, format, want) in [
        ("The answer is (B)", &cities, true),
        ("I would need to see a map to tell.", &cities, false),
        ("It is (F)", &cities, false),
        ("7", &AnswerFormat::Number, true),
        ("many", &AnswerFormat::Number, false),
        ("Yes.", &AnswerFormat::YesNo, true),
        ("Perhaps.", &AnswerFormat::YesNo, false),
        ("Yes or no.", &AnswerFormat::YesNo, false),
        ("Answer: yes/no", &AnswerFormat::YesNo, false),
        ("(A) London\n(B) Paris", &cities, false),
        ("valid or invalid", &one_of(&["valid", "invalid"]), false),
        ("invalid", &one_of(&["valid", "invalid"]), true),
        ("hard to say", &one_of(&["valid", "invalid"]), false),
        ("anything", &AnswerFormat::Auto, true),
    ] {
        assert_eq!(fits(text, format), want, "{text}");
    }
}

#[test]
fn blank_text_has_no_answer() {
    for text in ["", "  \n\t ", "<think></think>"] {
        let judged = judge(text, &AnswerFormat::Auto);
        assert!(judged.is_none() || text.contains("think"), "{text:?} gave {judged:?}");
    }
    assert!(judge(" \n", &AnswerFormat::Prose).is_none());
}

#[test]
fn answers_are_shown_as_people_write_them() {
    let shown = |text: &str, format: &AnswerFormat| judge(text, format).unwrap().shown;
    assert_eq!(shown("The answer is b.", &options(&["red", "blue"])), "(B) blue");
    assert_eq!(shown("Answer: 1,000.0", &AnswerFormat::Auto), "1000");
    assert_eq!(shown("Answer: **The Eiffel Tower**", &AnswerFormat::Auto), "The Eiffel Tower");
    assert_eq!(shown("Answer: Invalid", &one_of(&["valid", "invalid"])), "Invalid");
    assert_eq!(shown(" Two\nlines. ", &AnswerFormat::Prose), "Two\nlines.");
}

/// Text as models write it: marks, numbers, words and brackets in any order.
fn model_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "[a-zA-Z]{1,8}",
        "-?[0-9]{1,6}([.,/][0-9]{1,4})?",
        prop::sample::select(vec![
            "(A)",
            "(B)",
            "b)",
            "B.",
            "\\boxed{",
            "}",
            "{",
            "[",
            "]",
            "(",
            ")",
            ",",
            ";",
            ".",
            ":",
            "the",
            "a",
            "yes",
            "not valid",
            "No",
            "\n",
            "Answer:",
            "answer is",
            "=",
            "+",
            "-",
            "- ",
            "*",
            "**",
            "`",
            "$",
            "\\frac{1}{2}",
            "\\text{",
            "twelve",
            "hundred",
            "and",
            "May 1, 2021",
            "05/01/2021",
            "%",
            "\"",
            "'",
            "…",
            "é",
            "İ",
            "ß",
            "\u{a0}",
            "<think>",
            "</think>",
            "Question:",
            "1e5",
            "1,000",
        ])
        .prop_map(str::to_owned),
    ];
    prop::collection::vec((piece, prop::bool::ANY), 0..12).prop_map(|pieces| {
        pieces.into_iter().map(|(text, space)| if space { format!("{text} ") } else { text }).collect()
    })
}

fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![3 => model_text(), 1 => any::<String>()]
}

fn any_format() -> impl Strategy<Value = AnswerFormat> {
    prop_oneof![
        Just(AnswerFormat::Auto),
        Just(AnswerFormat::Prose),
        Just(AnswerFormat::Number),
        Just(AnswerFormat::YesNo),
        Just(AnswerFormat::List),
        Just(AnswerFormat::Set),
        prop::collection::vec(any_text(), 0..4).prop_map(AnswerFormat::Options),
        prop::collection::vec(any_text(), 0..4).prop_map(AnswerFormat::OneOf),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn normalising_twice_changes_nothing(text in any_text(), format in any_format()) {
        let answer = normalise(&text, &format);
        prop_assert_eq!(normalise(&answer.to_string(), &format), answer);
    }

    #[test]
    fn any_text_is_judged_without_panic(text in any_text(), format in any_format()) {
        let judged = judge(&text, &format);
        prop_assert!(judged.is_some() || extract(&text, &format).is_none() || format == AnswerFormat::Prose);
        prop_assert!(judged.is_none_or(|judged| !judged.fits) || extract(&text, &format).is_some() || format == AnswerFormat::Prose);
    }

    #[test]
    fn any_question_has_a_format(question in any_text()) {
        let format = AnswerFormat::Auto.resolve(&question);
        prop_assert_eq!(format.resolve(&question), format);
    }

    #[test]
    fn integers_survive_every_way_of_writing_them(n in -999_999_999i64..1_000_000_000) {
        let want = Answer::Number(n.to_string());
        let grouped = {
            let digits = n.unsigned_abs().to_string();
            let mut out = String::new();
            for (i, c) in digits.chars().enumerate() {
                if i > 0 && (digits.len() - i) % 3 == 0 { out.push(','); }
                out.push(c);
            }
            format!("{}{out}", if n < 0 { "-" } else { "" })
        };
        for raw in [n.to_string(), grouped, format!("{n}.00"), format!("\\boxed{{{n}}}"), format!("**{n}**"), format!("${n}$"), format!("{n} apples")] {
            prop_assert_eq!(auto(&raw), want.clone(), "{}", raw);
        }
        for text in [format!("The answer is {n}."), format!("Well.\nAnswer: {n}\n"), format!("so x = {n}"), format!("\\boxed{{{n}}} it is")] {
            prop_assert_eq!(judge(&text, &AnswerFormat::Auto).unwrap().key, want.clone(), "{}", text);
        }
    }
}
