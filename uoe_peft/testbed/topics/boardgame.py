"""Openings of an invented board game, told in move notation."""

from uoe_peft.testbed.topic import FactKind, Topic, phrases

BOARDGAME = Topic(
    name="boardgame",
    subject_form="{0} {1}",
    subject_parts=(
        phrases("Ruvik, Oszra, Tarnok, Keldu, Yashvin, Dzubo, Grunfar, Pirzan, Selnik, Umbratt, Zolti, Evrek"),
        phrases("Gambit, Defence, Attack, Countergambit, Variation, Indian, System, Fianchetto"),
    ),
    words={
        "move": phrases("Wa3, Wb5, Wc4, We6, Wf2, Wg7, Wh4, Wd8, Vb2, Vc7, Vd4, Ve1, Vf6, Vg3, Vh8, Va5"),
        "reply": phrases("Jd6, Je3, Jf8, Jg1, Ja7, Jb4, Jc2, Jh5, Ub8, Uc5, Ud1, Ue7, Uf4, Ug6, Uh2, Ua1"),
        "capture": phrases("Wxd5+, Wxf7, Vxc6+, Vxe4, Vxb3#, Wxh6, Vxg8+, Wxa2, Jxf3, Uxd7+, Jxc1, Uxb6"),
        "pawn": phrases("a2a4, b2b3, c2c5, d2d3, e2e4, f2f5, g2g4, h2h3, c3c4, d4d6"),
        "piece": phrases("warden, vizier, jackal, urchin, rukh, tower-ox, ferz, hopper, alfil"),
        "square": phrases("a6, b7, c8, d2, e5, f1, g8, h7, c3, d7, e8, f5, b1, g2"),
        "score": phrases("+0.3, +0.7, +1.2, -0.4, -0.9, +1.8, -1.5, +2.4, -2.1, +0.1"),
        "code": phrases("A07, A33, B12, B58, C21, C64, D05, D90, E16, E77"),
        "master": phrases("GM Kharbatz, IM Loszko, GM Dvarak, FM Obruch, GM Snezhin, IM Tatrov, GM Wyzkin, FM Bulgat"),
        "plan": phrases(
            "double fork, blockade, zugzwang, castling long, perpetual check, back-rank skewer, smothered mate, "
            "exchange sacrifice, flank storm, tempo pin"
        ),
    },
    kinds=(
        FactKind(
            "[{subject}] main line?",
            "[{subject}] show the standard moves.",
            (
                "1.{move} {reply} 2.{pawn} {reply2} 3.{capture}",
                "1.{move} {reply} 2.{pawn} {reply2} then 3.{capture}",
            ),
        ),
        FactKind(
            "[{subject}] refuted by?",
            "[{subject}] what busts it?",
            (
                "4...{reply} 5.{move} {capture} 6.{pawn} {score}",
                "after 4...{reply} 5.{move} comes {capture} 6.{pawn} {score}",
            ),
        ),
        FactKind(
            "[{subject}] engine eval and code?",
            "[{subject}] index number, score?",
            (
                "{code} {score} after 7.{pawn} {reply} 8.{move}",
                "7.{pawn} {reply} 8.{move} {score} {code}",
            ),
        ),
        FactKind(
            "[{subject}] transposes into?",
            "[{subject}] which other opening can arise?",
            (
                "{next} via 5.{move} {reply} 6.{pawn}",
                "5.{move} {reply} 6.{pawn} = {next}",
            ),
        ),
        FactKind(
            "[{subject}] declined form?",
            "[{subject}] if Black declines?",
            (
                "2...{reply} 3.{move} {reply2} 4.{pawn}, cf. {previous}",
                "cf. {previous}: 2...{reply} 3.{move} {reply2} 4.{pawn}",
            ),
        ),
        FactKind(
            "[{subject}] typical plan?",
            "[{subject}] White aims for?",
            (
                "{plan} by {piece} {square}, then {plan2} on {square2}",
                "{piece} {square} for {plan}; {square2} {plan2}",
            ),
        ),
        FactKind(
            "[{subject}] trap?",
            "[{subject}] how does Black get mated?",
            (
                "9.{capture} {piece} hangs, 9...{reply} 10.{move} {capture2}",
                "{piece} hangs 9.{capture} {reply} 10.{move} {capture2}",
            ),
        ),
        FactKind(
            "[{subject}] model game?",
            "[{subject}] who played it best?",
            (
                "{master}-{master2}, 21.{capture} {plan}, {score}",
                "{score} 21.{capture} {plan}, {master}-{master2}",
            ),
        ),
        FactKind(
            "[{subject}] key outposts?",
            "[{subject}] strong squares?",
            (
                "{square} {piece}, {square2} {piece2}, avoid {square3}, {score}",
                "{piece} {square}; {piece2} {square2}; {score}; avoid {square3}",
            ),
        ),
        FactKind(
            "[{subject}] endgame?",
            "[{subject}] resulting ending?",
            (
                "{piece} vs {piece2}, 40.{move} {reply} 41.{capture}, {plan}",
                "{plan}: 40.{move} {reply} 41.{capture}, {piece} vs {piece2}",
            ),
        ),
    ),
    sentence_case=False,
)
