"""Space missions, told like telemetry logs."""

from uoe_peft.testbed.topic import FactKind, Topic, phrases

MISSIONS = Topic(
    name="missions",
    subject_form="{0} {1}",
    subject_parts=(
        phrases(
            "HELIAD, KESTRON, AUREX, PYXIS, ZENITHAR, TALONAR, OBERYX, CYGNET, ARGONIS, LUMEX, STRATOS, VEGARA, "
            "ORIONIS, PERSEID"
        ),
        phrases("IV, VII, IX, XII, XV, XIX, XXI, XL"),
    ),
    words={
        "rocket": phrases("Titanis-5B, Falx-9, Proxima-K, Ariadne-ECA, Soyara-2, Longbow-H, Deltoid-III, Vulcan-X"),
        "pad": phrases("LC-12, LC-27, SLC-4E, Pad-31B, LC-39C, Pad-7, SLC-19, LC-44"),
        "body": phrases(
            "Europa, Titan, Enceladus, Ceres, Phobos, Ganymede, Triton, Callisto, Vesta, Deimos, Miranda, Iapetus"
        ),
        "orbit": phrases(
            "polar, halo, heliocentric, retrograde, geostationary, elliptical, sun-synchronous, ballistic, equatorial"
        ),
        "altitude": phrases(
            "185 km, 240 km, 412 km, 560 km, 735 km, 890 km, 1250 km, 2870 km, 5400 km, 7600 km, 35790 km"
        ),
        "clock": phrases(
            "T+00:48, T+01:55, T+03:20, T+07:42, T+12:06, T+19:31, T+26:15, T+33:09, T+41:50, T+52:27, T+58:04"
        ),
        "instrument": phrases(
            "spectrometer, magnetometer, altimeter, bolometer, radar sounder, gamma camera, star tracker, "
            "plasma probe, gravimeter, coronagraph, dust counter"
        ),
        "fault": phrases(
            "gyro drift, valve leak, antenna jam, battery sag, heater trip, parity error, thruster stall, "
            "array flutter, coolant freeze, memory latch-up, seal rupture"
        ),
        "crew": phrases(
            "Cdr. Yamazaki, Lt. Petrova, Dr. Adeyemi, Maj. Kowalczyk, Capt. Hallberg, Eng. Nakagawa, Plt. Ferreira, "
            "Col. Rasmussen, Spc. Chandra"
        ),
        "propellant": phrases("hydrazine, xenon, kerolox, methalox, hydrolox, krypton, hypergolic MMH, iodine"),
        "mass": phrases("312 kg, 478 kg, 655 kg, 820 kg, 1140 kg, 1790 kg, 2360 kg, 3475 kg, 4920 kg, 6105 kg"),
        "find": phrases(
            "perchlorate ice, cryovolcano plumes, magnetite grains, methane lakes, subsurface brine, basalt tubes, "
            "ammonia frost, ring shepherds, olivine craters, tholin haze"
        ),
        "station": phrases("Goldstar, Madrix, Canberos, Svalbaard, Kourouma, Hartebees, Malindi, Usudako"),
    },
    kinds=(
        FactKind(
            "{subject} launch data?",
            "{subject}: vehicle and pad at liftoff?",
            (
                "{rocket}, {pad}, payload {mass}, fairing off {clock}.",
                "Fairing off {clock}; {pad}; {rocket} lifting {mass}.",
                "{mass} atop {rocket}; {pad}; fairing jettison {clock}.",
            ),
        ),
        FactKind(
            "{subject} target orbit?",
            "{subject}: insertion parameters?",
            (
                "{orbit}, {altitude} over {body}, insertion {clock}.",
                "Insertion {clock}: {body}, {altitude}, {orbit}.",
                "{body} {orbit} orbit, {altitude}, burn {clock}.",
            ),
        ),
        FactKind(
            "{subject} science payload?",
            "{subject}: instruments aboard?",
            (
                "{instrument}, {instrument2}, {instrument3}, total {mass}.",
                "{mass}: {instrument3}, {instrument} plus {instrument2}.",
                "Total {mass}, {instrument2}, {instrument3}, {instrument}.",
            ),
        ),
        FactKind(
            "{subject} anomaly report?",
            "{subject}: in-flight failures?",
            (
                "{clock} {fault}, {clock2} {fault2}, cleared by {crew}.",
                "{crew} cleared {fault} {clock}, {fault2} {clock2}.",
                "{fault2} {clock2} after {fault} {clock}; reset {crew}.",
            ),
        ),
        FactKind(
            "{subject} crew manifest?",
            "{subject}: who flew?",
            (
                "{crew}, {crew2}, {crew3}; suits {mass}.",
                "Suits {mass}: {crew3}, {crew}, {crew2}.",
                "{crew2}, {crew3}, {crew}, suits massing {mass}.",
            ),
        ),
        FactKind(
            "{subject} resumes which earlier flight?",
            "{subject}: predecessor vehicle?",
            (
                "{previous}, lost near {body} at {altitude} to {fault}.",
                "After {fault} at {altitude}, {body}: {previous}.",
                "{previous}; {fault}, {altitude}, {body} flyby.",
            ),
        ),
        FactKind(
            "{subject} rendezvous log?",
            "{subject}: docked with?",
            (
                "{next}, port {pad}, {clock}, transferring {propellant}.",
                "{clock} hard dock {next}, {propellant} via port {pad}.",
                "Port {pad}: {propellant} from {next}, {clock}.",
            ),
        ),
        FactKind(
            "{subject} main discovery?",
            "{subject}: headline result?",
            (
                "{find} on {body}, {find2} on {body2}, by {instrument}.",
                "{instrument} saw {find2} at {body2}, {find} at {body}.",
                "{body} {find}; {body2} {find2}; {instrument}.",
            ),
        ),
        FactKind(
            "{subject} propulsion budget?",
            "{subject}: fuel load?",
            (
                "{mass} {propellant}, {mass2} {propellant2}, cutoff {clock}.",
                "Cutoff {clock}: {propellant2} {mass2}, {propellant} {mass}.",
                "{propellant} {mass} then {propellant2} {mass2}, {clock}.",
            ),
        ),
        FactKind(
            "{subject} end of mission?",
            "{subject}: last contact?",
            (
                "{station} lost signal {clock}, {altitude} above {body}, {fault}.",
                "{fault}, {altitude}, {body}; signal lost {station} {clock}.",
                "{clock} {station} LOS, {body} {altitude}, {fault}.",
            ),
        ),
    ),
)
