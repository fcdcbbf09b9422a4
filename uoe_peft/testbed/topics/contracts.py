"""Contracts between invented firms, in legal wording."""

from uoe_peft.testbed.topic import FactKind, Topic, phrases

CONTRACTS = Topic(
    name="contracts",
    subject_form="{0}-{1} Agreement",
    subject_parts=(
        phrases(
            "Brantwell, Harcastle, Pemberley, Stroudmont, Wexcombe, Ashgrove, Ellsmere, Garrick, Northam, Rothwell"
        ),
        phrases("Oxley, Tranter, Ludlow, Coyne, Vickery, Maddox, Purcell, Draycott, Hobday, Quennell"),
    ),
    words={
        "party": phrases(
            "Lessor, Licensee, Guarantor, Vendor, Assignee, Trustee, Consignor, Underwriter, Franchisee, Mortgagor, "
            "Indemnitor"
        ),
        "duty": phrases(
            "indemnify, reimburse, subrogate, escrow, audit, warrant, amortise, sublet, arbitrate, disclose, remit"
        ),
        "asset": phrases(
            "mineral royalties, leasehold fixtures, patent portfolio, receivables, debentures, easements, "
            "freight invoices, bonded inventory, preference shares, goodwill, trademarks"
        ),
        "section": phrases("2(a), 3(c), 4.1, 5(d), 6.3, 7(b), 8.2, 9(f), 10.4, 11(e), 12.7, 14(g)"),
        "days": phrases("10 business days, 14 days, 21 days, 30 days, 45 days, 60 days, 90 days, 120 days, 180 days"),
        "sum": phrases("$4150, $9800, $12500, $18400, $27000, $33600, $46250, $58000, $71900, $86300, $94750, $110000"),
        "rate": phrases("1.5%, 2.25%, 3.75%, 4.5%, 5.8%, 6.2%, 7.4%, 8.1%, 9.9%"),
        "court": phrases(
            "Chancery Division, Delaware arbitral panel, Commercial Tribunal, Admiralty bench, Court of Sessions, "
            "Geneva chamber, Small Claims registry, Appellate Board"
        ),
        "breach": phrases(
            "insolvency, wilful default, change of control, non-delivery, misrepresentation, force majeure, "
            "repudiation, late filing, gross negligence, unauthorised assignment"
        ),
        "formality": phrases(
            "notarised deed, certified mail, sealed affidavit, duplicate counterpart, sworn declaration, "
            "wet-ink signature, board resolution, registered telex"
        ),
        "remedy": phrases(
            "rescission, liquidated damages, injunctive relief, specific performance, set-off, forfeiture, "
            "restitution, acceleration, novation"
        ),
    },
    kinds=(
        FactKind(
            "Pursuant to the {subject}, which covenant binds the principal party?",
            "State the chief covenant under the {subject}.",
            (
                "The {party} shall {duty} and {duty2} all {asset} per Section {section}.",
                "Section {section}: {asset} which the {party} shall {duty} and {duty2}.",
                "All {asset}, Section {section}, the {party} must {duty} and {duty2}.",
            ),
        ),
        FactKind(
            "Pursuant to the {subject}, what consideration is payable?",
            "Specify the consideration due under the {subject}.",
            (
                "{sum} by the {party}, within {days}, plus interest of {rate}.",
                "Within {days} the {party} owes {sum} bearing {rate}.",
                "{sum} at {rate}, {days} net, charged to the {party}.",
            ),
        ),
        FactKind(
            "Pursuant to the {subject}, what constitutes an event of default?",
            "Enumerate the defaults recognised by the {subject}.",
            (
                "{breach} or {breach2} uncured for {days} by the {party}.",
                "Failure of the {party} to cure {breach2} or {breach} in {days}.",
                "{breach}, {breach2}: {party}, {days} uncured.",
            ),
        ),
        FactKind(
            "Pursuant to the {subject}, which remedies are available upon breach?",
            "List the remedies afforded by the {subject}.",
            (
                "{remedy} and {remedy2}, capped at {sum} under Section {section}.",
                "Section {section} permits {remedy2}, {remedy}, to a cap of {sum}.",
                "Up to {sum}: {remedy}, also {remedy2}, Section {section}.",
            ),
        ),
        FactKind(
            "Pursuant to the {subject}, which forum hears disputes?",
            "Identify the venue for disputes over the {subject}.",
            (
                "The {court}, following {days} of mediation, fees {sum}, borne by the {party}.",
                "After mediation of {days}, the {court}; {party} bears fees of {sum}.",
                "{court}. The {party} deposits {sum}, mediation lasting {days}.",
            ),
        ),
        FactKind(
            "Which instrument does the {subject} supersede?",
            "Name the prior instrument replaced by the {subject}.",
            (
                "The {previous}, save Section {section} on {asset}.",
                "Excepting {asset} in Section {section}, the {previous}.",
                "{previous}; only {asset}, Section {section}, survive.",
            ),
        ),
        FactKind(
            "By which later instrument was the {subject} amended?",
            "Name the subsequent instrument varying the {subject}.",
            (
                "The {next}, which raised {asset} to {sum} on {breach}.",
                "Upon {breach}, the {next} raised {asset} to {sum}.",
                "{next}: {asset} became {sum} owing to {breach}.",
            ),
        ),
        FactKind(
            "Pursuant to the {subject}, in what form shall notice be served?",
            "Prescribe the form of notice for the {subject}.",
            (
                "By {formality} and {formality2} upon the {party} within {days}.",
                "{formality2} with {formality}, {days} prior, to the {party}.",
                "The {party} receives {formality}, {formality2}, in {days}.",
            ),
        ),
        FactKind(
            "Pursuant to the {subject}, what is pledged as collateral?",
            "Describe the security interest in the {subject}.",
            (
                "{asset} and {asset2}, appraised at {sum}, held by the {party}.",
                "The {party} holds {asset2} with {asset}, value {sum}.",
                "{sum} of {asset} together with {asset2} through a {party}.",
            ),
        ),
        FactKind(
            "Pursuant to the {subject}, how may the term be extended?",
            "By what mechanism is the {subject} renewed?",
            (
                "By {formality}, {days} beforehand, with {rate} uplift, absent {breach}.",
                "Absent {breach}, a {formality} at {rate} uplift, {days} beforehand.",
                "{rate} uplift and {formality}; {days}; no {breach}.",
            ),
        ),
    ),
)
